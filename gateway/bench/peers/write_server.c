/* The least that a server of WebSockets can do: for each burst one write(2) per socket, of the
 * burst's frames joined. No library, no TLS, one channel, one thread, no blocking call but
 * epoll_wait(2) (and, for a socket whose buffer is full, poll(2)).
 *
 * It is no WebSocket server that a browser would accept: the handshake's proof
 * (Sec-WebSocket-Accept) is left out, since the load generator does not ask for it, and whatever a
 * subscriber sends first is its subscription. Argument: port. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MAX_EVENTS = 1024, REQUEST_BYTES = 131072, STALLED_MS = 10000 };
enum state { FREE, HTTP, GREETED, SUBSCRIBED };

struct connection {
  enum state state;
  size_t place; /* in `subscribed` */
  size_t held;  /* bytes of a request that is not complete */
  char *request;
};

static struct connection *connections; /* by descriptor */
static int *subscribed;
static size_t subscribers;
static int poller;

static void fail(const char *what) {
  perror(what);
  exit(1);
}

static void *grown(void *old, size_t bytes) {
  void *memory = realloc(old, bytes);
  if (memory == NULL) fail("memory");
  return memory;
}

static void forget(int fd) {
  struct connection *connection = &connections[fd];
  if (connection->state == SUBSCRIBED) {
    int last = subscribed[--subscribers];
    subscribed[connection->place] = last;
    connections[last].place = connection->place;
  }
  free(connection->request);
  memset(connection, 0, sizeof *connection);
  close(fd);
}

/* 0 when everything was written, else -1. */
static int write_all(int fd, const char *bytes, size_t length) {
  for (;;) {
    ssize_t written = write(fd, bytes, length);
    if (written == (ssize_t)length) return 0;
    if (written >= 0) {
      bytes += written;
      length -= (size_t)written;
    } else if (errno == EAGAIN) {
      struct pollfd full = {.fd = fd, .events = POLLOUT};
      if (poll(&full, 1, STALLED_MS) <= 0) return -1;
    } else if (errno != EINTR) {
      return -1;
    }
  }
}

static size_t frame_header(char *header, size_t length) {
  header[0] = (char)0x81;
  if (length < 126) {
    header[1] = (char)length;
    return 2;
  }
  if (length < 65536) {
    header[1] = 126;
    header[2] = (char)(length >> 8);
    header[3] = (char)length;
    return 4;
  }
  header[1] = 127;
  for (int byte = 0; byte < 8; byte++) header[2 + byte] = (char)(length >> (56 - 8 * byte));
  return 10;
}

static int send_text(int fd, const char *text) {
  char frame[256];
  size_t length = strlen(text), start = frame_header(frame, length);
  memcpy(frame + start, text, length);
  return write_all(fd, frame, start + length);
}

static void publish(size_t count, const char *text, size_t length) {
  static char *burst;
  char header[10];
  size_t start = frame_header(header, length), frame = start + length;
  burst = grown(burst, frame * count);
  for (size_t number = 0; number < count; number++) {
    memcpy(burst + number * frame, header, start);
    memcpy(burst + number * frame + start, text, length);
  }
  for (size_t place = subscribers; place-- > 0;) {
    int fd = subscribed[place];
    if (write_all(fd, burst, frame * count) < 0) forget(fd);
  }
}

/* Serves the request at the buffer's begin; -1 when the connection is of no use any more. */
static int serve(int fd, struct connection *connection) {
  connection->request[connection->held] = '\0';
  char *end = strstr(connection->request, "\r\n\r\n");
  if (end == NULL) return 0;
  *end = '\0';
  char *body = end + 4;
  if (strcasestr(connection->request, "\r\nupgrade: websocket") != NULL) {
    static const char upgraded[] =
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n";
    free(connection->request);
    connection->request = NULL;
    connection->state = GREETED;
    if (write_all(fd, upgraded, sizeof upgraded - 1) < 0) return -1;
    return send_text(fd, "{\"event\":\"pusher:connection_established\",\"data\":\"{}\"}");
  }
  char *field = strcasestr(connection->request, "\r\ncontent-length:");
  size_t length = field == NULL ? 0 : strtoul(field + 17, NULL, 10);
  if ((size_t)(body - connection->request) + length > connection->held) {
    *end = '\r';
    return 0;
  }
  unsigned long count = 0;
  if (sscanf(connection->request, "POST /publish/%lu/", &count) == 1) publish(count, body, length);
  connection->held = 0;
  static const char answer[] = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}";
  return write_all(fd, answer, sizeof answer - 1);
}

static int receive(int fd) {
  struct connection *connection = &connections[fd];
  if (connection->state == HTTP) {
    if (connection->request == NULL) connection->request = grown(NULL, REQUEST_BYTES + 1);
    char *place = connection->request + connection->held;
    ssize_t count = read(fd, place, REQUEST_BYTES - connection->held);
    if (count <= 0) return count < 0 && errno == EAGAIN ? 0 : -1;
    connection->held += (size_t)count;
    return serve(fd, connection);
  }
  char ignored[4096];
  ssize_t count = read(fd, ignored, sizeof ignored);
  if (count <= 0) return count < 0 && errno == EAGAIN ? 0 : -1;
  if (connection->state == GREETED) {
    connection->state = SUBSCRIBED;
    connection->place = subscribers;
    subscribed[subscribers++] = fd;
    return send_text(fd, "{\"event\":\"pusher_internal:subscription_succeeded\",\"data\":\"{}\"}");
  }
  return 0;
}

static void take_connections(int listener, size_t limit) {
  int fd, yes = 1;
  while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
    if ((size_t)fd >= limit) fail("descriptor");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    connections[fd].state = HTTP;
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event) < 0) fail("epoll_ctl");
  }
}

static int listen_on(int port) {
  int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), yes = 1;
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((unsigned short)port)};
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
  if (bind(listener, (struct sockaddr *)&address, sizeof address) < 0) fail("bind");
  if (listen(listener, 4096) < 0) fail("listen");
  return listener;
}

int main(int count, char **arguments) {
  struct rlimit files;
  if (count != 2 || getrlimit(RLIMIT_NOFILE, &files) < 0) return 2;
  size_t limit = files.rlim_cur < 1 << 20 ? files.rlim_cur : 1 << 20;
  connections = calloc(limit, sizeof *connections);
  subscribed = calloc(limit, sizeof *subscribed);
  if (connections == NULL || subscribed == NULL) fail("memory");
  int listener = listen_on(atoi(arguments[1]));
  poller = epoll_create1(EPOLL_CLOEXEC);
  struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, ready[MAX_EVENTS];
  if (poller < 0 || epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event) < 0) fail("epoll");
  for (;;) {
    int found = epoll_wait(poller, ready, MAX_EVENTS, -1);
    for (int index = 0; index < found; index++) {
      int fd = ready[index].data.fd;
      if (fd == listener) {
        take_connections(listener, limit);
      } else if (connections[fd].state != FREE && receive(fd) < 0) {
        forget(fd);
      }
    }
  }
}
