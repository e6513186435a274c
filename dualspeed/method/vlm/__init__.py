"""Stock VLMs: what a family needs of its own (families), and how its modules and images are reached."""
