"""What lies on disk, and how it is kept in memory."""
