"""Integration with Flask: tasks in the request's session, an application context for each processor.

.. code-block:: python

    db = SQLAlchemy()
    apoq = Apoq()

    @apoq.processor("send_welcome")
    def send_welcome(task): ...

    def create_app():
        app = Flask(__name__)
        app.config["SQLALCHEMY_DATABASE_URI"] = database_url(os.environ["DATABASE_URL"])
        db.init_app(app)
        apoq.init_app(app)
        return app
"""

from apoq.flask.extension import Apoq
from apoq.flask.tasks import AppTask

__all__ = ["Apoq", "AppTask"]
