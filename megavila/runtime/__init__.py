"""Devices, processes, randomness and bookkeeping: what every other package stands on."""
