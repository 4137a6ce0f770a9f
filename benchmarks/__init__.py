"""Measures fused_rnn against every library that runs the same layers; see README.md here."""
