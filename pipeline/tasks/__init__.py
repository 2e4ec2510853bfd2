"""Long-running work that clients can watch and cancel, and trust."""
