"""Training: one loop for the three stages (TaskRL, offline distillation, MOPD), blind to the algorithm.

A stage's source makes samples, token by token what the policy drew and what was said of it (streams.py); the loop
(loop.py) turns a batch of them into one optimiser step through m3kernels.policy_loss (objective.py).
"""
