"""What travels between processes and how: the codec and the queues."""
