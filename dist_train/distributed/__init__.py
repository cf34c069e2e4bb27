"""The ranks of a job: who they are, how they communicate, how they are asked to stop."""
