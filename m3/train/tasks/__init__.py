"""Small tasks that are scored exactly, on which the stages of training can be seen to learn in minutes on a CPU."""
