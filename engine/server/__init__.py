"""The HTTP server: OpenAI's interface and a chat page, for the users of one machine. Extra `serve`."""
