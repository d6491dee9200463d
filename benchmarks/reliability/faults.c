/* Makes the n-th system call below a folder fail, for benchmarks/reliability/faults.py.

   Loaded with LD_PRELOAD and armed by fault_arm(). Counted are open, write, fsync, rename, link and mkdir on
   paths that begin with the folder's, and every execve. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX], last[PATH_MAX + 16];
static size_t length;
static long counted, failing;
static int armed, number, persistent;

/* n: the call that fails, from 1; 0 for none. error: its errno; below 0 kills the process there.
   lasting: all calls after it fail as well. */
void fault_arm(const char *path, long n, int error, int lasting) {
    strncpy(folder, path, sizeof folder - 1);
    length = strlen(folder);
    counted = 0, failing = n, number = error, persistent = lasting, last[0] = 0, armed = 1;
}

long fault_disarm(void) {
    armed = 0;
    return counted;
}

const char *fault_last(void) { return last; }

static int fails(const char *call, const char *path) {
    if (!armed || path == NULL || (length && strncmp(path, folder, length) != 0)) return 0;
    long now = __atomic_add_fetch(&counted, 1, __ATOMIC_SEQ_CST);
    if (failing == 0 || now < failing || (now > failing && !persistent)) return 0;
    if (number < 0) kill(getpid(), SIGKILL);
    if (now == failing) snprintf(last, sizeof last, "%s %s", call, path);
    errno = number;
    return 1;
}

static int fails_fd(const char *call, int fd) {
    char link[64], path[PATH_MAX];
    if (!armed) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return fails(call, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define MODE(flags, mode) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { va_list a; va_start(a, flags); mode = va_arg(a, mode_t); va_end(a); }

int open(const char *p, int flags, ...) { MODE(flags, m) return fails("open", p) ? -1 : REAL(open)(p, flags, m); }
int open64(const char *p, int flags, ...) { MODE(flags, m) return fails("open", p) ? -1 : REAL(open64)(p, flags, m); }
int openat(int d, const char *p, int flags, ...) {
    MODE(flags, m) return fails("open", p) ? -1 : REAL(openat)(d, p, flags, m);
}
int openat64(int d, const char *p, int flags, ...) {
    MODE(flags, m) return fails("open", p) ? -1 : REAL(openat64)(d, p, flags, m);
}
ssize_t write(int f, const void *b, size_t n) { return fails_fd("write", f) ? -1 : REAL(write)(f, b, n); }
ssize_t writev(int f, const struct iovec *v, int n) { return fails_fd("write", f) ? -1 : REAL(writev)(f, v, n); }
ssize_t pwrite(int f, const void *b, size_t n, off_t o) { return fails_fd("write", f) ? -1 : REAL(pwrite)(f, b, n, o); }
ssize_t pwrite64(int f, const void *b, size_t n, off64_t o) {
    return fails_fd("write", f) ? -1 : REAL(pwrite64)(f, b, n, o);
}
int ftruncate(int f, off_t n) { return fails_fd("truncate", f) ? -1 : REAL(ftruncate)(f, n); }
int ftruncate64(int f, off64_t n) { return fails_fd("truncate", f) ? -1 : REAL(ftruncate64)(f, n); }
int fsync(int f) { return fails_fd("fsync", f) ? -1 : REAL(fsync)(f); }
int fdatasync(int f) { return fails_fd("fsync", f) ? -1 : REAL(fdatasync)(f); }
int rename(const char *a, const char *b) { return fails("rename", b) ? -1 : REAL(rename)(a, b); }
int renameat(int d, const char *a, int e, const char *b) { return fails("rename", b) ? -1 : REAL(renameat)(d, a, e, b); }
int link(const char *a, const char *b) { return fails("link", b) ? -1 : REAL(link)(a, b); }
int linkat(int d, const char *a, int e, const char *b, int f) {
    return fails("link", b) ? -1 : REAL(linkat)(d, a, e, b, f);
}
int mkdir(const char *p, mode_t m) { return fails("mkdir", p) ? -1 : REAL(mkdir)(p, m); }
int mkdirat(int d, const char *p, mode_t m) { return fails("mkdir", p) ? -1 : REAL(mkdirat)(d, p, m); }

int execve(const char *p, char *const argv[], char *const env[]) {
    size_t whole = length;
    length = 0; /* a program is anywhere */
    int failed = fails("spawn", p);
    length = whole;
    return failed ? -1 : REAL(execve)(p, argv, env);
}
