"""What several test modules hold a backend to, and the data for it."""
