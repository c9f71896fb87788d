"""What can be added to a training (new words, a norm's limit, ...): one interface, a file each."""
