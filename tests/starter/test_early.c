/* What is begun on the launcher's word alone: 0, or abort with the line. */
#define _GNU_SOURCE
#include "../../starter/early.c"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);                \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

static struct launch launch;

/* The judgement itself is policy.c's and tested with it; here it is enough that it is asked. */
static int judged = ERR_OK;

int policy_plan(const struct launch *l, const struct container_plan *plan) {
    CHECK(plan->uid == l->uid && plan->gid == l->gid && plan->group_count == 0);
    for (int set = 0; set < CAP_SETS; set++)
        CHECK(plan->caps[set] == 0);
    return judged;
}

static void reset(enum flow flow) {
    memset(&launch, 0, sizeof(launch));
    config_defaults(&launch.config);
    launch.flow = flow;
    launch.uid = 1000;
    launch.gid = 1001;
    launch.request.total = launch.request.engine_file_off + 1;
    launch.request.forecast = FORECAST_CONTAINER;
    judged = ERR_OK;
}

static void test_a_forecast_is_cut_down(void) {
    struct container_plan plan;
    reset(FLOW_SETUID);
    launch.request.forecast_spaces = UINT32_MAX;
    launch.request.forecast_flags = UINT32_MAX;
    CHECK(early_plan(&launch, &plan));
    CHECK(plan.spaces == (SPACE_PID | SPACE_IPC | SPACE_UTS) && plan.fuse_count == 0);
    CHECK((plan.flags & (PLAN_KERNEL_IMAGE | PLAN_METHODS)) == 0);
    CHECK(plan.flags & PLAN_NO_NEW_PRIVS);
    launch.request.forecast_spaces = 0;
    CHECK(early_plan(&launch, &plan) && !(plan.flags & PLAN_SHIM) && plan.spaces == 0);
    launch.request.forecast |= FORECAST_FUSE;
    CHECK(early_plan(&launch, &plan) && plan.fuse_count == 1);
}

static void test_who_gets_no_early_container(void) {
    struct container_plan plan;
    reset(FLOW_ROOT);
    CHECK(!early_plan(&launch, &plan));
    reset(FLOW_USERNS);
    launch.uid = 0;
    CHECK(!early_plan(&launch, &plan));
    reset(FLOW_SETUID);
    launch.request.forecast = 0;
    CHECK(!early_plan(&launch, &plan));
    reset(FLOW_USERNS);
    launch.request.total++; /* an engine of the caller's own */
    CHECK(!early_plan(&launch, &plan));
    reset(FLOW_SETUID);
    judged = ERR_REFUSED;
    CHECK(!early_plan(&launch, &plan));
}

static void request_of(const char *bytes, size_t size, uint32_t argc) {
    reset(FLOW_SETUID);
    launch.request_fd = memfd_create("request", MFD_CLOEXEC);
    CHECK(launch.request_fd >= 0 && write(launch.request_fd, bytes, size) == (ssize_t)size);
    launch.request.argv_off = 0;
    launch.request.argc = argc;
}

static void test_words(void) {
    static const char bytes[] = "exec\0image.sif\0\0true";
    char word[32];
    request_of(bytes, sizeof(bytes), 4);
    CHECK(early_word(&launch, 0, word, sizeof(word)) && strcmp(word, "exec") == 0);
    CHECK(early_word(&launch, 1, word, sizeof(word)) && strcmp(word, "image.sif") == 0);
    CHECK(!early_word(&launch, 2, word, sizeof(word))); /* an empty word names nothing */
    CHECK(early_word(&launch, 3, word, sizeof(word)) && strcmp(word, "true") == 0);
    CHECK(!early_word(&launch, 4, word, sizeof(word)));
    CHECK(!early_word(&launch, UINT32_MAX, word, sizeof(word)));
    CHECK(!early_word(&launch, 1, word, strlen("image.sif"))); /* no room for the NUL */
    CHECK(early_word(&launch, 1, word, sizeof("image.sif")));
    close(launch.request_fd);
}

static void test_words_that_do_not_end(void) {
    static char bytes[3 * LIMIT_PATH_BYTES];
    char word[LIMIT_PATH_BYTES];
    memset(bytes, 'x', sizeof(bytes));
    request_of(bytes, sizeof(bytes), 3);
    CHECK(!early_word(&launch, 0, word, sizeof(word)) && !early_word(&launch, 1, word, 16));
    close(launch.request_fd);
    bytes[LIMIT_PATH_BYTES - 1] = '\0'; /* as long as a path may be */
    request_of(bytes, sizeof(bytes), 3);
    CHECK(early_word(&launch, 0, word, sizeof(word)) && strlen(word) == LIMIT_PATH_BYTES - 1);
    CHECK(!early_word(&launch, 1, word, sizeof(word)));
    close(launch.request_fd);
    request_of("a", 1, 2); /* cut in the middle */
    CHECK(!early_word(&launch, 0, word, sizeof(word)) && !early_word(&launch, 1, word, 16));
    close(launch.request_fd);
}

static void test_the_name_of_the_image(void) {
    static const char good[] = "exec\0/etc/../etc/passwd", bad[] = "exec\0/no/such/file";
    char path[64];
    request_of(good, sizeof(good), 2);
    launch.request.image_arg = 1;
    path[0] = '\0';
    early_image(&launch, path, sizeof(path));
    CHECK(strcmp(path, "/etc/passwd") == 0); /* as the kernel knows it */
    path[0] = '\0';
    early_image(&launch, path, 5);
    CHECK(strlen(path) < 5);
    close(launch.request_fd);
    request_of(bad, sizeof(bad), 2);
    launch.request.image_arg = 1;
    path[0] = '\0';
    early_image(&launch, path, sizeof(path));
    CHECK(strlen(path) < sizeof(path));
    close(launch.request_fd);
}

int main(void) {
    test_a_forecast_is_cut_down();
    test_who_gets_no_early_container();
    test_words();
    test_words_that_do_not_end();
    test_the_name_of_the_image();
    return 0;
}
