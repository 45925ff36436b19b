"""What was fetched once, kept for all later launches of its user."""
