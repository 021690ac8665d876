"""What ``python -m nvflare_llm_components.cli`` starts."""

from nvflare_llm_components.cli import app

if __name__ == "__main__":
    app()
