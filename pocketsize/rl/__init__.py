"""Reinforcement learning that knows no compression: states, actions and rewards alone."""
