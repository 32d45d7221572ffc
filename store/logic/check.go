package logic

import (
	"fmt"
	"reflect"
	"strings"

	"redoubt.dev/redoubt/store/tree"
	"redoubt.dev/redoubt/store/wire"
)

// Check says whether an action can be the meaning of a request of type t from domain d. What it
// lets pass, the client could have asked for itself with that type, so a worker that answers
// wrongly gains nothing for anybody: it can only put other arguments into the one operation,
// which is then carried out with the client's own rights. That is all State trusts a worker
// with; an action that Check refuses costs the worker its place.
func (a Action) Check(t wire.Type, d tree.Domain) error {
	if a.Errno != "" {
		if !known[a.Errno] || !reflect.DeepEqual(a, Action{Errno: a.Errno}) {
			return fmt.Errorf("%w: bad refusal %.20q", ErrAnswer, string(a.Errno))
		}
		return nil
	}
	rest := a
	if takesPath(t) {
		if err := a.checkPath(t, d); err != nil {
			return err
		}
		rest.Path, rest.Relative = "", false
	}
	switch t {
	case wire.Read, wire.Directory, wire.GetPerms, wire.Mkdir, wire.Remove, wire.TransactionStart, wire.ResetWatches:
	case wire.Write:
		rest.Value = nil
	case wire.DirectoryPart:
		rest.Offset = 0
	case wire.SetPerms:
		if len(a.Perms) == 0 {
			return fmt.Errorf("%w: no permissions", ErrAnswer)
		}
		rest.Perms = nil
	case wire.Watch, wire.Unwatch:
		rest.Token = ""
	case wire.TransactionEnd:
		rest.Commit = false
	case wire.Introduce, wire.Release, wire.GetDomainPath, wire.IsDomainIntroduced, wire.Resume:
		rest.Domain = 0
	case wire.SetTarget:
		rest.Domain, rest.Target = 0, 0
	case wire.Control:
		if len(a.Words) == 0 {
			return fmt.Errorf("%w: no command", ErrAnswer)
		}
		rest.Words = nil
	default:
		return fmt.Errorf("%w: a meaning for %v", ErrAnswer, t)
	}
	if a.Domain > maxDomain || a.Target > maxDomain || !reflect.DeepEqual(rest, Action{}) {
		return fmt.Errorf("%w: arguments that %v does not have", ErrAnswer, t)
	}
	if n := a.size(); n > wire.MaxPayload+wire.MaxRelPath {
		return fmt.Errorf("%w: arguments of %d bytes", ErrAnswer, n)
	}
	return nil
}

func takesPath(t wire.Type) bool {
	switch t {
	case wire.Read, wire.Directory, wire.GetPerms, wire.Mkdir, wire.Remove, wire.Write, wire.DirectoryPart,
		wire.SetPerms, wire.Watch, wire.Unwatch:
		return true
	}
	return false
}

func (a Action) checkPath(t wire.Type, d tree.Domain) error {
	switch {
	case strings.HasPrefix(a.Path, "@") && special(t) && !a.Relative && len(a.Path) <= wire.MaxRelPath:
		return nil
	case tree.Check(a.Path) != nil:
		return fmt.Errorf("%w: path of %d bytes", ErrAnswer, len(a.Path))
	case a.Relative && !strings.HasPrefix(a.Path, tree.Home(d)+"/"):
		return fmt.Errorf("%w: relative path of another domain", ErrAnswer)
	}
	return nil
}

// size is what the arguments take, roughly as in a payload.
func (a Action) size() int {
	n := len(a.Path) + len(a.Token) + len(a.Value) + 2*len(a.Perms)
	for _, w := range a.Words {
		n += len(w) + 1
	}
	return n
}

var known = map[tree.Errno]bool{tree.EINVAL: true, tree.ENOSYS: true}
