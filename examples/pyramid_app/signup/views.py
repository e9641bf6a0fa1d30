from pyramid.httpexceptions import HTTPSeeOther
from pyramid.view import view_config
from sqlalchemy import select

from signup.models import Mail, User


@view_config(route_name="home", renderer="templates/home.jinja2")
def home(request):
    return {"mails": request.dbsession.scalars(select(Mail).order_by(Mail.id))}


@view_config(route_name="sign_up", request_method="POST")
def sign_up(request):
    user = User(name=request.params["name"], email=request.params["email"])
    request.dbsession.add(user)
    request.dbsession.flush()  # for its id
    request.apoq.add("send_welcome", {"user_id": user.id})
    if "fail" in request.params:
        raise RuntimeError("the user and the task are rolled back")
    return HTTPSeeOther(request.route_url("home"))  # pyramid_tm then commits both
