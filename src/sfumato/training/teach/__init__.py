"""What `sfumato teach` decides: style, subject or word, captions, and the plan."""
