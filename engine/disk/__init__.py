"""What lies on a disk: read once it is checked, written whole or not, searched with an end."""
