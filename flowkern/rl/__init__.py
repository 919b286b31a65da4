"""What is learned from samples: advantages, objectives, and one recipe per algorithm."""
