"""Requests to a server with OpenAI's API, nothing of whose replies is trusted."""
