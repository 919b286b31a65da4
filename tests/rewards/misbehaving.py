"""A server of raw sockets, for what no well-written server does."""

import socket
import struct
import threading
from contextlib import contextmanager


def read_request(connection):
    """(head, body) of one request, by its Content-Length."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    lengths = [
        int(line.split(b":")[1])
        for line in head.split(b"\r\n")
        if line.lower().startswith(b"content-length")
    ]
    while len(body) < (lengths or [0])[0]:
        body += connection.recv(65536)
    return head, body


def answer(body, status="200 OK", length=None, headers=""):
    length = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\ncontent-length: {length}\r\n{headers}\r\n".encode() + body


def reset(connection):
    """An RST in the place of an orderly end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@contextmanager
def misbehaving(*behaviours):
    """(url, requests): connection i is given to behaviours[i] (the last of them to all further
    ones) as behave(connection, is_over) after its request was read.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    is_over, requests, threads = threading.Event(), [], []

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            behave = behaviours[min(len(threads), len(behaviours) - 1)]
            threads.append(threading.Thread(target=one, args=(connection, behave)))
            threads[-1].start()

    def one(connection, behave):
        try:
            requests.append(read_request(connection))
            behave(connection, is_over)
        except OSError:
            pass
        finally:
            connection.close()

    acceptor = threading.Thread(target=serve)
    acceptor.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", requests
    finally:
        is_over.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in (acceptor, *threads):
            thread.join(5)
