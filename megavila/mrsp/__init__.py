"""Multi-modal reinforcement sequence parallelism: one video read once, however many rollouts and GPUs."""
