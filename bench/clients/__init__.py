"""Do other people's clients work against ``pearl serve``, and do they find what they should?"""
