"""What each operator means, in NumPy: the contract that every kernel is tested against. One operator a file."""
