"""One rank's slice of a spread model, alone on a device: what a rank's steps take without the other ranks."""
