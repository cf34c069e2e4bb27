"""A job from its configuration to its trained model: order of events, checkpoints, resume, export, tracking."""
