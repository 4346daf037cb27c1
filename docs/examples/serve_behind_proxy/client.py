"""Talk with a server through its proxy. Needs the package openai.

    pip install openai
    SVDENGINE_API_KEY=... python docs/examples/serve_behind_proxy/client.py [https://llm.example.com/v1]

The key is one of those in keys.txt; see the Caddyfile beside this program.
"""

import os
import sys

import openai

URL = "https://llm.example.com/v1"


def main() -> None:
    """Stream one answer."""
    url = sys.argv[1] if len(sys.argv) > 1 else URL
    client = openai.OpenAI(base_url=url, api_key=os.environ.get("SVDENGINE_API_KEY", "none"), max_retries=3)
    try:
        model = client.models.list().data[0].id  # a server has one model
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Say hello in three languages."}],
            max_tokens=60,
            stream=True,
            stream_options={"include_usage": True},
        )
        for piece in stream:
            if piece.choices:
                print(piece.choices[0].delta.content or "", end="", flush=True)
            if piece.usage:
                print(f"\n{piece.usage.completion_tokens} tokens")
    except openai.RateLimitError as error:
        sys.exit(f"the server is full: {error.message}")
    except openai.APIConnectionError:
        sys.exit(f"no server answers at {url}")
    except openai.APIStatusError as error:
        sys.exit(f"refused with status {error.status_code}: {error.message}")


if __name__ == "__main__":
    main()
