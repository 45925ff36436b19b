/*
 * The parser of the administrator's file, from inside and from outside.
 *
 *     test_config                    all rows of the table, numbers, lists, limits: 0 or abort
 *     test_config any|trusted FILE   opens and reads a file, prints problems and values
 */

#define _GNU_SOURCE
#include "../../starter/config.c"
#include "../../starter/config_open.c"
#include "../../starter/config_value.c"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

static struct config config;
static struct config_error why;

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);                \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

static int parse_bytes(const char *text, size_t length)
{
    int fd = memfd_create("config", MFD_CLOEXEC);
    int result;

    CHECK(fd >= 0 && write(fd, text, length) == (ssize_t)length);
    memset(&why, 0, sizeof(why));
    result = config_parse_fd(fd, &config, &why);
    close(fd);
    return result;
}

static int parse(const char *text)
{
    return parse_bytes(text, strlen(text));
}

static int parse_value(enum config_id id, const char *value, size_t length)
{
    char text[512];

    (void)snprintf(text, sizeof(text), "%s = %.*s\n", config_key(id), (int)length, value);
    return parse(text);
}

static void check_default(enum config_id id)
{
    const struct config_row *row = &config_rows[id];

    config_defaults(&config);
    CHECK(config_line(&config, id) == 0);
    if (row->kind == KIND_LIST)
        CHECK((config_list_count(&config, id) != 0) == (row->value[0] != '\0'));
    else
        CHECK(strcmp(config_string(&config, id), row->value) == 0);
    CHECK(parse_value(id, row->value, strlen(row->value)) == 0);
    CHECK(config_line(&config, id) == 1);
    CHECK(parse_value(id, "", 0) == 0);
    CHECK(config_list_count(&config, id) == 0);
}

static void check_refused(enum config_id id, const char *value)
{
    CHECK(parse_value(id, value, strlen(value)) == -EINVAL);
    CHECK(why.count == 1 && why.problem[0].line == 1);
    CHECK(strcmp(why.problem[0].key, config_key(id)) == 0);
    CHECK(why.problem[0].text[0] != '\0' && why.problem[0].nearest[0] == '\0');
    if (config_rows[id].kind != KIND_LIST)
        CHECK(strcmp(config_string(&config, id), config_rows[id].value) == 0);
}

static void check_words(enum config_id id)
{
    unsigned place = 0;

    for (const char *word = config_rows[id].allowed; *word; place++) {
        size_t length = strcspn(word, "|");

        CHECK(parse_value(id, word, length) == 0);
        if (config_rows[id].kind == KIND_ENUM)
            CHECK(config_enum(&config, id) == place);
        if (config_rows[id].kind == KIND_BOOL)
            CHECK(config_bool(&config, id) == (place == 0));
        word += length + (word[length] != '\0');
    }
    check_refused(id, "maybe");
    check_refused(id, "YES");
    check_refused(id, "yes # certainly");
}

static void check_range(enum config_id id)
{
    const char *bar = strchr(config_rows[id].allowed, '|');
    char above[32];

    CHECK(bar && parse_value(id, bar + 1, strlen(bar + 1)) == 0);
    CHECK(config_uint(&config, id) == strtoull(bar + 1, NULL, 10));
    (void)snprintf(above, sizeof(above), "%llu", strtoull(bar + 1, NULL, 10) + 1);
    check_refused(id, above);
    check_refused(id, "18446744073709551616");
    check_refused(id, "-1");
    check_refused(id, "many");
}

static void check_paths(enum config_id id)
{
    CHECK(parse_value(id, "/opt/x", 6) == 0);
    if (config_rows[id].kind == KIND_LIST)
        CHECK(strcmp(config_list_item(&config, id, 0), "/opt/x") == 0);
    else
        CHECK(strcmp(config_string(&config, id), "/opt/x") == 0);
    check_refused(id, "opt/x");
}

static void check_row(enum config_id id)
{
    const struct config_row *row = &config_rows[id];

    check_default(id);
    check_refused(id, "/a\033[2J");
    CHECK(config_id_of(row->key) == id);
    CHECK(config_nearest_key(row->key) == row->key);
    switch (row->kind) {
    case KIND_BOOL:
    case KIND_ENUM:
        check_words(id);
        break;
    case KIND_UINT:
        check_range(id);
        break;
    case KIND_PATH:
    case KIND_PATHLIST:
        check_paths(id);
        break;
    case KIND_LIST:
        if (strcmp(row->allowed, "paths") == 0)
            check_paths(id);
        else
            CHECK(parse_value(id, "domain users", 12) == 0 && config_list_count(&config, id) == 1);
        break;
    case KIND_STRING:
    default:
        CHECK(parse_value(id, "some text", 9) == 0);
        CHECK(strcmp(config_string(&config, id), "some text") == 0);
    }
}

static void check_enum_names(void)
{
    static const struct {
        enum config_id id;
        unsigned place;
        const char *word;
    } names[] = {
        {CONFIG_MOUNT_DEV, MOUNT_DEV_YES, "yes"},
        {CONFIG_MOUNT_DEV, MOUNT_DEV_NO, "no"},
        {CONFIG_MOUNT_DEV, MOUNT_DEV_MINIMAL, "minimal"},
        {CONFIG_ENABLE_OVERLAY, OVERLAY_YES, "yes"},
        {CONFIG_ENABLE_OVERLAY, OVERLAY_NO, "no"},
        {CONFIG_ENABLE_OVERLAY, OVERLAY_TRY, "try"},
        {CONFIG_ENABLE_OVERLAY, OVERLAY_DRIVER, "driver"},
        {CONFIG_ENABLE_UNDERLAY, UNDERLAY_YES, "yes"},
        {CONFIG_ENABLE_UNDERLAY, UNDERLAY_NO, "no"},
        {CONFIG_ENABLE_UNDERLAY, UNDERLAY_PREFERRED, "preferred"},
        {CONFIG_ALLOW_SETUID_MOUNT_SQUASHFS, SETUID_SQUASHFS_YES, "yes"},
        {CONFIG_ALLOW_SETUID_MOUNT_SQUASHFS, SETUID_SQUASHFS_NO, "no"},
        {CONFIG_ALLOW_SETUID_MOUNT_SQUASHFS, SETUID_SQUASHFS_IFLIMITED, "iflimited"},
        {CONFIG_ROOT_DEFAULT_CAPABILITIES, ROOT_CAPS_FULL, "full"},
        {CONFIG_ROOT_DEFAULT_CAPABILITIES, ROOT_CAPS_FILE, "file"},
        {CONFIG_ROOT_DEFAULT_CAPABILITIES, ROOT_CAPS_NO, "no"},
        {CONFIG_MEMORY_FS_TYPE, MEMORY_FS_TMPFS, "tmpfs"},
        {CONFIG_MEMORY_FS_TYPE, MEMORY_FS_RAMFS, "ramfs"},
    };
    unsigned covered[CONFIG_COUNT] = {0};

    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        CHECK(parse_value(names[i].id, names[i].word, strlen(names[i].word)) == 0);
        CHECK(config_enum(&config, names[i].id) == names[i].place);
        covered[names[i].id]++;
    }
    for (unsigned id = 0; id < CONFIG_COUNT; id++) {
        unsigned words = 1;

        for (const char *p = config_rows[id].allowed; *p; p++)
            words += *p == '|';
        CHECK(covered[id] == (config_rows[id].kind == KIND_ENUM ? words : 0));
    }
}

static void check_numbers(void)
{
    static const struct {
        const char *text;
        bool good;
        uint64_t number;
    } cases[] = {
        {"0", true, 0},          {"007", true, 7},        {"010", true, 8},
        {"0x10", true, 16},      {"0XfF", true, 255},     {"0o17", true, 15},
        {"0b101", true, 5},      {"1_000", true, 1000},   {"0x_1", true, 1},
        {"", false, 0},          {"08", false, 0},        {"0x", false, 0},
        {"_1", false, 0},        {"1_", false, 0},        {"1__0", false, 0},
        {"+5", false, 0},        {"5 ", false, 0},        {"0b2", false, 0},
        {"1e3", false, 0},       {"0xg", false, 0},
        {"18446744073709551615", true, UINT64_MAX},
        {"18446744073709551616", false, 0},
        {"99999999999999999999999999", false, 0},
    };

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        uint64_t number = 0;

        CHECK(parse_uint(cases[i].text, &number) == cases[i].good);
        CHECK(!cases[i].good || number == cases[i].number);
    }
}

static void check_lists(void)
{
    const enum config_id binds = CONFIG_BIND_PATH;
    const enum config_id users = CONFIG_ALLOW_SETUID_USERS;

    CHECK(parse("bind path = /a , /b,,/c\r\nallow setuid users = root, 1000\n"
                "bind path=/d e\nallow setuid users = 007\nbind path =\n") == 0);
    CHECK(config_list_count(&config, binds) == 4 && config_line(&config, binds) == 1);
    CHECK(strcmp(config_list_item(&config, binds, 2), "/c") == 0);
    CHECK(strcmp(config_list_item(&config, binds, 3), "/d e") == 0);
    CHECK(config_list_item(&config, binds, 4) == NULL);
    CHECK(config_list_item(&config, CONFIG_ALLOW_SETUID, 0) == NULL);
    CHECK(config_list_has(&config, users, "root", 0));
    CHECK(config_list_has(&config, users, NULL, 1000));
    CHECK(config_list_has(&config, users, "bond", 7));
    CHECK(!config_list_has(&config, users, "roo", 100));
    CHECK(!config_list_has(&config, users, NULL, UINT64_MAX));
    CHECK(parse("") == 0 && config_list_count(&config, binds) == 0);
    CHECK(!config_list_has(&config, users, "", 0));
    config_defaults(&config);
    CHECK(config_list_count(&config, binds) == 2);
    CHECK(strcmp(config_list_item(&config, binds, 0), "/etc/localtime") == 0);
    CHECK(strcmp(config_list_item(&config, binds, 1), "/etc/hosts") == 0);
}

static void check_wrong_types(void)
{
    config_defaults(&config);
    CHECK(!config_bool(&config, CONFIG_MAX_LOOP_DEVICES));
    CHECK(config_uint(&config, CONFIG_ALLOW_SETUID) == 0);
    CHECK(config_enum(&config, CONFIG_ALLOW_SETUID) == 0);
    CHECK(config_string(&config, CONFIG_COUNT)[0] == '\0');
    CHECK(config_list_count(&config, CONFIG_COUNT) == 0);
    CHECK(config_line(&config, CONFIG_COUNT) == 0);
    CHECK(config_key(CONFIG_COUNT)[0] == '\0');
}

/* A struct config has no pointers into itself: starter may hand it on by copying. */
static void check_copy(void)
{
    static struct config copy;

    CHECK(parse("audit log = /var/log/x\nbind path = /a,/b\n") == 0);
    memcpy(&copy, &config, sizeof(copy));
    memset(&config, 0xff, sizeof(config));
    CHECK(strcmp(config_string(&copy, CONFIG_AUDIT_LOG), "/var/log/x") == 0);
    CHECK(strcmp(config_list_item(&copy, CONFIG_BIND_PATH, 1), "/b") == 0);
}

static void check_limits(void)
{
    static char text[CONFIG_FILE_BYTES + 16];
    size_t n = (size_t)snprintf(text, sizeof(text), "allow setuid users = ");

    memset(text + n, '#', sizeof(text) - n);
    CHECK(parse_bytes(text, CONFIG_FILE_BYTES) == 0);
    CHECK(strlen(config_list_item(&config, CONFIG_ALLOW_SETUID_USERS, 0)) == CONFIG_FILE_BYTES - n);
    CHECK(parse_bytes(text, CONFIG_FILE_BYTES + 1) == -EFBIG && why.count == 1);
    CHECK(config_list_count(&config, CONFIG_ALLOW_SETUID_USERS) == 0);
    for (unsigned i = 0; i < CONFIG_ITEMS; i++)
        memcpy(text + n + 2 * i, "a,", 2);
    CHECK(parse_bytes(text, n + 2 * CONFIG_ITEMS) == 0);
    CHECK(config_list_count(&config, CONFIG_ALLOW_SETUID_USERS) == CONFIG_ITEMS);
    memcpy(text + n + 2 * CONFIG_ITEMS, "a", 1);
    CHECK(parse_bytes(text, n + 2 * CONFIG_ITEMS + 1) == -EINVAL && why.count == 1);
    memset(text, '=', CONFIG_FILE_BYTES);
    for (unsigned i = 1; i < CONFIG_FILE_BYTES; i += 2)
        text[i] = '\n';
    CHECK(parse_bytes(text, CONFIG_FILE_BYTES) == -EINVAL);
    CHECK(why.count == CONFIG_FILE_BYTES / 2);
}

static int check_everything(void)
{
    for (unsigned id = 0; id < CONFIG_COUNT; id++)
        check_row((enum config_id)id);
    check_enum_names();
    check_numbers();
    check_lists();
    check_wrong_types();
    check_copy();
    check_limits();
    printf("%d directives\n", CONFIG_COUNT);
    return 0;
}

static void print_value(enum config_id id)
{
    printf("value|%s|%u|", config_key(id), config_line(&config, id));
    for (size_t n = 0; n < config_list_count(&config, id); n++)
        printf("%s%s", n ? "," : "", config_list_item(&config, id, n));
    printf("%s\n", config_string(&config, id));
}

static int print_file(const char *path, bool trusted)
{
    int fd = config_open(path, trusted, &why);
    int result = fd < 0 ? fd : config_parse_fd(fd, &config, &why);

    for (uint32_t n = 0; n < why.count && n < CONFIG_PROBLEMS; n++)
        printf("problem|%u|%s|%s|%s\n", why.problem[n].line, why.problem[n].key,
               why.problem[n].text, why.problem[n].nearest);
    for (unsigned id = 0; fd >= 0 && id < CONFIG_COUNT; id++)
        print_value((enum config_id)id);
    printf("result|%s\n", result ? strerrorname_np(-result) : "good");
    if (fd >= 0)
        close(fd);
    return 0;
}

int main(int argc, char **argv)
{
    return argc == 3 ? print_file(argv[2], strcmp(argv[1], "trusted") == 0) : check_everything();
}
