/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "options.h"

#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Options that are numbers. */
static const struct number {
    const char *name;
    unsigned int lowest;
    unsigned int highest;
    size_t offset;
} numbers[] = {
    { "latency_us", 0, 10000000, offsetof(struct options, latency_us) },
    { "slots", 1, OPTIONS_MAX_SLOTS, offsetof(struct options, slots) },
    { "pairs", 1, OPTIONS_MAX_PAIRS, offsetof(struct options, pairs) },
    { "fail", 0, UINT_MAX, offsetof(struct options, fail) },
    { "dead", 0, UINT_MAX, offsetof(struct options, dead) },
    { "hang", 0, UINT_MAX, offsetof(struct options, hang) },
    { "mtu", 68, 65535, offsetof(struct options, mtu) },
};

static const struct flag {
    const char *name;
    size_t offset;
} flags[] = {
    { "resumes", offsetof(struct options, resumes) },
    { "header", offsetof(struct options, header) },
};

static const struct text {
    const char *name;
    size_t room;
    size_t offset;
} texts[] = {
    { "name", sizeof(((struct options *)0)->name), offsetof(struct options, name) },
    { "ibdev", sizeof(((struct options *)0)->ibdev_path), offsetof(struct options, ibdev_path) },
    { "tap", sizeof(((struct options *)0)->tap), offsetof(struct options, tap) },
    { "bridge", sizeof(((struct options *)0)->bridge), offsetof(struct options, bridge) },
};

static bool to_number(const char *text, unsigned long lowest, unsigned long highest, unsigned int *number)
{
    char *end;
    unsigned long value;

    errno = 0;
    value = strtoul(text, &end, 10);
    if (errno != 0 || end == text || *end != '\0' || value < lowest || value > highest) {
        return false;
    }
    *number = value;
    return true;
}

static bool to_uplinks(struct options *options, char *text)
{
    char *rest = NULL;

    for (char *one = strtok_r(text, ":", &rest); one != NULL; one = strtok_r(NULL, ":", &rest)) {
        unsigned int fd;

        if (options->uplinks == OPTIONS_MAX_PAIRS || !to_number(one, 0, INT_MAX, &fd)) {
            return false;
        }
        options->uplink[options->uplinks++] = fd;
    }
    return options->uplinks > 0;
}

static bool to_text(char *to, size_t room, const char *text)
{
    return (size_t)snprintf(to, room, "%s", text) < room;
}

static bool set(struct options *options, const char *name, char *value)
{
    for (size_t i = 0; i < sizeof(numbers) / sizeof(*numbers); i++) {
        if (strcmp(name, numbers[i].name) == 0) {
            return to_number(value, numbers[i].lowest, numbers[i].highest,
                             (unsigned int *)((char *)options + numbers[i].offset));
        }
    }
    for (size_t i = 0; i < sizeof(flags) / sizeof(*flags); i++) {
        if (strcmp(name, flags[i].name) == 0) {
            *((bool *)((char *)options + flags[i].offset)) = *value == '1';
            return strcmp(value, "0") == 0 || strcmp(value, "1") == 0;
        }
    }
    for (size_t i = 0; i < sizeof(texts) / sizeof(*texts); i++) {
        if (strcmp(name, texts[i].name) == 0) {
            return to_text((char *)options + texts[i].offset, texts[i].room, value);
        }
    }
    return strcmp(name, "uplink") == 0 && to_uplinks(options, value);
}

/* Take `text`, which is taken to pieces, into the options. Returns what makes no sense, or NULL. */
static const char *parse(struct options *options, char *text)
{
    char *rest = NULL;

    for (char *option = strtok_r(text, ",", &rest); option != NULL; option = strtok_r(NULL, ",", &rest)) {
        char *value = strchr(option, '=');

        if (value == NULL) {
            return option;
        }
        *value = '\0';
        if (!set(options, option, value + 1)) {
            return option;
        }
    }
    if (options->uplinks != 0 && (options->uplinks != options->pairs || options->tap[0] != '\0')) {
        return "uplink";
    }
    return options->bridge[0] == '\0' || options->tap[0] != '\0' ? NULL : "bridge";
}

/* What is said of this copy of the library, in one line; NULL: nothing. The caller's to free. */
static char *from_file(void)
{
    Dl_info here;
    char path[PATH_MAX], *line = NULL;
    const char *slash;
    size_t room = 0;
    FILE *file;

    if (dladdr((void *)options_read, &here) == 0 || (slash = strrchr(here.dli_fname, '/')) == NULL) {
        return NULL;
    }
    snprintf(path, sizeof(path), "%.*s/%s", (int)(slash - here.dli_fname), here.dli_fname, OPTIONS_FILE);
    file = fopen(path, "re");
    if (file == NULL) {
        return NULL;
    }
    if (getline(&line, &room, file) < 0) {
        free(line);
        line = NULL;
    } else {
        line[strcspn(line, "\n")] = '\0';
    }
    fclose(file);
    return line;
}

bool options_read(struct options *options)
{
    const char *variable = getenv(OPTIONS_VARIABLE);
    char *given = variable != NULL ? strdup(variable) : from_file();
    const char *wrong = NULL;
    char *text;

    *options = (struct options){
        .name = "mlx5_0", .latency_us = 800, .slots = 8, .pairs = 8, .resumes = true, .mtu = 1500,
    };
    text = given != NULL ? strdup(given) : NULL;
    if (text != NULL) {
        wrong = parse(options, text);
    }
    if (wrong != NULL) {
        fprintf(stderr, "emulated mlx5: %s makes no sense in %s='%s'\n", wrong,
                variable != NULL ? OPTIONS_VARIABLE : OPTIONS_FILE, given);
    }
    free(text);
    free(given);
    return wrong == NULL;
}
