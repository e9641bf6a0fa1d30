"""A site on which people sign up and get a welcome mail."""

import os

from pyramid.config import Configurator

ENVIRONMENT = {"DATABASE_URL": "sqlalchemy.url", "SMTP_HOST": "smtp.host", "SMTP_PORT": "smtp.port"}


def with_environment(settings):
    """Return the settings, in which environment variables override the ini file."""
    given = {setting: os.environ[name] for name, setting in ENVIRONMENT.items() if name in os.environ}
    return {**settings, **given}


def main(global_config, **settings):
    with Configurator(settings=with_environment(settings)) as config:
        config.include(".models")
        config.add_route("home", "/")
        config.add_route("sign_up", "/sign-up")
        config.scan()  # the views, and the tasks
        return config.make_wsgi_app()
