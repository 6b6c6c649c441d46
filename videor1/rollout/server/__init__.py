"""The engine that asks a server which speaks OpenAI's API."""
