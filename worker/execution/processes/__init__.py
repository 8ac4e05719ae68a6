"""What zygote, child and children are made of: messages, kernel calls, limits, one run's line."""
