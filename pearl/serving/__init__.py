"""The engine as a service: many clients of one LLM. Nothing that is served imports it."""
