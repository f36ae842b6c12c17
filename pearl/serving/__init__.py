"""The engine as a service: many clients of one LLM, and the HTTP server around it, which needs the extra ``serve``.
Nothing that is served imports it.
"""
