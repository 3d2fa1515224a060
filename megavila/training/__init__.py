"""What every trainer shares: gradients, optimizer, schedules, resumable state and the step loop."""
