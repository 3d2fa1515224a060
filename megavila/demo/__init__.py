"""`megavila demo`: videos, SFT, GRPO and a report from one command on a machine with two cores."""
