"""What rounds would take, from traced token ranks and measured forwards."""
