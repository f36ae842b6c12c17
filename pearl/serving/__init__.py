"""The HTTP server: ``pearl serve``. It needs the extra ``pearl-engine[serve]``; the engine never imports it."""
