"""What the worker says of itself: events, and who listens to them."""
