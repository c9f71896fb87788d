"""What `sfumato check` finds in a folder of images, and mends."""
