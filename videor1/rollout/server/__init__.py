"""The rollout engine that samples from a server with OpenAI's API."""
