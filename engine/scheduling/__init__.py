"""Who runs next: requests, sequences, the scheduler, and the loop that drives an executor."""
