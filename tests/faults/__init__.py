"""What no input, kill or disk may break."""
