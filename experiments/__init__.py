"""What is measured with the scripts, and how it is shown."""
