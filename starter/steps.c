/* Places where a process of a launch can be told to die, in builds for tests. */
#include "steps.h"

#ifdef APY_TEST_STEPS
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { TEST_PATIENCE_MS = 120000 };
static const char die_name[] = "APY_TEST_DIE=", wait_name[] = "APY_TEST_WAIT=";
static const char limit_name[] = "APY_TEST_LIMIT_MS=";

struct place {
    int step, role, end;
};
/* Memory of its own, shared: it stays where descriptors are closed and signals are blocked.  How
 * many have come, who came last, how many may pass; another place than the first, if there is one.
 */
struct gate {
    int reached, role, open, step, end;
};
static struct place die_place = {-1, -1, 0}, wait_place = {-1, -1, 0};
static volatile struct gate *gate;
static char texts[2][64];
static char *environment[3];
static int limit_ms;

static const char *find(char *const envp[], const char *name, char *copy) {
    size_t length = strlen(name);
    for (; *envp; envp++)
        if (strncmp(*envp, name, length) == 0 && strlen(*envp) < sizeof(texts[0])) {
            memcpy(copy, *envp, strlen(*envp) + 1);
            return copy + length;
        }
    return NULL;
}

static void read_wait(const char *text) {
    struct place *p = &wait_place;
    int fd = -1;
    if (sscanf(text, "%d:%d:%d:%d", &p->step, &p->role, &p->end, &fd) != 4)
        return;
    void *page = mmap(NULL, sizeof(*gate), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    gate = page == MAP_FAILED ? NULL : page;
}

void test_read_environment(char *const envp[]) {
    const char *die = find(envp, die_name, texts[0]), *wait = find(envp, wait_name, texts[1]);
    char number[sizeof(texts[0])];
    const char *limit = find(envp, limit_name, number);
    size_t count = 0;
    if (limit)
        (void)sscanf(limit, "%d", &limit_ms);
    if (die)
        (void)sscanf(die, "%d:%d:%d", &die_place.step, &die_place.role, &die_place.end);
    if (wait)
        read_wait(wait);
    for (int i = 0; i < 2; i++)
        if (texts[i][0])
            environment[count++] = texts[i];
}

int test_limit_ms(int usual) {
    return limit_ms > 0 ? limit_ms : usual;
}

char *const *test_environment(void) {
    return environment;
}

static bool is_here(const struct place *p, uint32_t step, int role, bool end) {
    return (int)step == p->step && end == (p->end != 0) && (p->role < 0 || p->role == role);
}

static struct place wait_where(void) {
    struct place p = wait_place;
    if (gate->step)
        p = (struct place){gate->step, -1, gate->end};
    return p;
}

static void wait_here(int role) {
    static const struct timespec moment = {.tv_nsec = 1000000};
    int moments = TEST_PATIENCE_MS; /* a test that was killed opens nothing any more */
    int number = gate->reached + 1;
    gate->role = role;
    gate->reached = number;
    while (gate->open < number && moments-- > 0)
        (void)nanosleep(&moment, NULL);
}

void test_here(uint32_t step, int role, bool end) {
    static const char told[] = "STEPS:   a process dies here\n"; /* a test must see that it did */
    struct place place = gate ? wait_where() : die_place;
    if (gate && is_here(&place, step, role, end) && gate->open <= gate->reached)
        wait_here(role);
    if (!is_here(&die_place, step, role, end))
        return;
    ssize_t ignored = write(STDERR_FILENO, told, sizeof(told) - 1);
    (void)ignored;
    (void)kill(getpid(), SIGKILL);
    __builtin_trap(); /* the first process of a pid namespace cannot kill itself */
}
#endif
