"""What is wrong, or will be: answers as data, which change nothing."""
