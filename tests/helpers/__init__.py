"""What tests share: tiny models, fixed rollouts, slow computations, processes of several ranks. No tests."""
