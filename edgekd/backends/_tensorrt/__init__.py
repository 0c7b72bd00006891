"""What the backend `tensorrt` and the build recipe on the board share: each file stands alone, Python 3.8."""
