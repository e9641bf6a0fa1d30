from django.db import connection, transaction
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.shortcuts import render
from django.urls import reverse
from django.views.decorators.http import require_POST

from .models import Mail, User
from .tasks import send_welcome


def index(request: HttpRequest) -> HttpResponse:
    mails = Mail.objects.select_related("user").order_by("id")
    return render(request, "signup/index.html", {"mails": mails})


@require_POST
def sign_up(request: HttpRequest) -> HttpResponse:
    with transaction.atomic():
        user = User.objects.create(name=request.POST["name"], email=request.POST["email"])
        send_welcome.add(connection.connection, user_id=user.pk)
        if "fail" in request.POST:
            raise RuntimeError("the user and the task are rolled back")
    # Both are committed now.
    return HttpResponseRedirect(reverse("index"), status=303)
