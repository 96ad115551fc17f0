"""Running a model: the policy that chooses its width."""
